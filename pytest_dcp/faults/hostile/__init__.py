"""Files made to do harm: malicious pickles, memory bombs, fuzzed metadata."""

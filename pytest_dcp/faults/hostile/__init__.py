"""Files built to do harm: malicious pickles, memory bombs, fuzzed metadata."""

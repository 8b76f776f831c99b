"""The harness: test item -> world -> ranks -> outcome."""

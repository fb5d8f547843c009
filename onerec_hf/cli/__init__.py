"""The `onerec-hf` command: thin scripts over the library."""

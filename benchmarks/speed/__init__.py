"""Speed and memory: ratios of interleaved runs."""

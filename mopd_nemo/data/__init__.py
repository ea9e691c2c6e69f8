"""Problems: the built-in arithmetic task, JSONL files, and the benchmarks that become JSONL files."""

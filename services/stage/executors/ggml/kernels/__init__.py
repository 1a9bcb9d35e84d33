"""noodle's own C kernels (`executors/kernels/`) as operations of ggml's graphs."""

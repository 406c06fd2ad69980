"""Time and memory of the kernels, compared with other libraries."""

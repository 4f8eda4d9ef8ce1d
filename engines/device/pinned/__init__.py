"""Host memory that cannot be paged out, through which and from which weights go to a CUDA card."""

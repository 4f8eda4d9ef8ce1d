"""What concerns the machine and any program on it: files, locks, memory, cores, sizes, progress."""

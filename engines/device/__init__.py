"""What backends on a device share: memory, slots, budgets, and the CUDA card."""

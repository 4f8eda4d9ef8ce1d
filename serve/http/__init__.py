"""The HTTP face of the service: requests in, LoRA files, job reports and problem documents out."""

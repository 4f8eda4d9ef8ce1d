"""What looks at things and tells: inspection, check-up, diagnosis, verification, pictures."""

"""What differs between systems, and how: calls that only Windows has, and memory that maps a file."""

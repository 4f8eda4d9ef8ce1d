"""LoRAs: their files and their mathematics."""

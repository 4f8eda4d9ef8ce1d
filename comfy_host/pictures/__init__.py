"""Pictures in ComfyUI: files to IMAGE, and what became of their colour profiles."""

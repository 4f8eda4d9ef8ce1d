"""What the nodes ask of ComfyUI: its folders, its progress bar and interrupt, its memory management."""

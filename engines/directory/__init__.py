"""The engines directory on disk: what lies in it, whether it is whole, and how it is read."""

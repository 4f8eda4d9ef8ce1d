"""What a build makes for one backend, beside the packs that all share."""

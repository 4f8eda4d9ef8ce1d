"""A card is trusted once it has shown that it is right."""

"""Everything that knows how diffusers and transformers lay a model out."""

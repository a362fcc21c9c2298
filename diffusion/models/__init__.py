"""Networks and the folder they live in: the only home of diffusers and transformers."""

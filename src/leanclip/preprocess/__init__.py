"""Raw input to tensors: text to token ids, image bytes to pixels."""

"""Loaded models: features, similarity, classification, embeddings, export."""

"""Use a trained model: features, similarity, classification, embeddings, export."""

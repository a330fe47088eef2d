"""The book's style and its diagram of the layer."""

"""Cross-entropy: of class indices alone, and row by row with every option."""

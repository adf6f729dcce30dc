"""Networks: the encoder and its adapters, positions, predictors and heads. Knows no objective and no data."""

"""Where a model's layers tell what their backward has at hand, and what gradient they get."""

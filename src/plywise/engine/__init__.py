"""The engine: captures calls of linear maps and lets a rule answer in backward."""

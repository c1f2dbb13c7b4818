"""Initial weights from data: closed forms of the related papers, one file a paper."""

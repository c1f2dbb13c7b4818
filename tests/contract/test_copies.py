"""deepcopy and pickle of the model are free of plywise; a copied rule is its hyper-parameters."""

from plywise.testing.contract.test_copies import *

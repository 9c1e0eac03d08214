"""The paper's Tables 5 to 13, published and reproduced, by one command; see `__main__`."""

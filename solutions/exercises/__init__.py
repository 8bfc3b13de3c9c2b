"""The exercises of the course. Complete the functions; `pytest labs` grades them."""

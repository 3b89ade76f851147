"""wave -> encoder -> FSQ -> tokens -> FSQ -> decoder -> wave, in plain torch."""

"""Bodies of requests and answers, field for field as clients see them."""

"""Networks that come with weights and are not trained here."""

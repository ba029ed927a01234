"""One file per architecture, named after config.json's model_type. No torch."""

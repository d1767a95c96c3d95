"""Between a batch and a number. Imports nothing, so that ``lightning_modules.functional`` loads without Lightning."""

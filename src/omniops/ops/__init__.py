"""The operators, one file each: checks, schema, fake kernel, autograd, autocast and the public function."""

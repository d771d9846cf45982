"""Programs that use pa_compiler, as anybody might write them."""

"""What makes stacked runs fast: shuffles without sorting, rows without gathers, dense layers, compiler options."""

"""Image quality: what each method does to pictures and to layers, measured, tabled and plotted."""

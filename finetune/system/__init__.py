"""What every package uses: errors, files, processes, devices, the terminal, pages."""

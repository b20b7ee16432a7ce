"""What every room uses: sampling, errors, files, and what is kept between runs."""

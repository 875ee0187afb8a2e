"""Data: files to rows to demonstrations (`readers`), to splits (`loading`), to training examples (`examples`)."""

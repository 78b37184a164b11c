"""The HTML page of a validation: verdict, plots and pictures."""

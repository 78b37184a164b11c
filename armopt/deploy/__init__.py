"""What a server needs around a bundle: doctor, package, server, tune."""

"""What the tests share: partners, servers and filters; tests/README.md says what is where."""

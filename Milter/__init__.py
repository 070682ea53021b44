"""Mail filters (milters) for Postfix and sendmail, in Python."""

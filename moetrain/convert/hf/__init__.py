"""The modelling code that travels with an exported model which no stock architecture computes; it is copied, never imported from here."""

"""What a served model bears: many clients, broken files, and how soon a person hears something."""

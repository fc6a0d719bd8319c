"""What connects the core to other software: other libraries' models, published weights, export."""

"""Money: from the gateways' journals into the ledger, and out of it as usage, invoices and exports."""

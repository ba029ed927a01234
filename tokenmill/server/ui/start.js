// Shows this server's own document. No validator: it would send the document to another host.
window.onload = function () {
  window.ui = SwaggerUIBundle({
    url: "../api-doc/openapi.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null,
  });
};
